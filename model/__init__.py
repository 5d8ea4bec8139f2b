"""IndRNN models in torch: recurrence, layers, stacks, causal features, the network; and the contract both halves share."""
