"""Makes models: reads data sets, trains, evaluates, exports to ONNX and proves that the file says what the network says."""
