"""Language modelling: ids in, the next token's probabilities out."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.network import Network
from model.tokens import TokenFeatures, next_token_loss

TEXT = "the cat sat on the mat and the rat sat on the cat. "  # what follows a letter is told by several letters before it
LETTERS = sorted(set(TEXT))
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"kind": "plain", "layers": 3, "memory": "normal", "horizon": 50},
    "residual": {"kind": "residual", "memory": "normal", "horizon": 50},
    "lstm": {"kind": "lstm"},
}


def language_model(kind: str, **changes: Any) -> Network:
    torch.manual_seed(0)
    settings = {"head": "tokens", "layers": 2, "units": 48, "dropout": 0.0} | KINDS[kind] | changes
    return Network(ModelConfig(**settings), (1,), len(LETTERS))


def text(rows: int, steps: int, seed: int = 0) -> Tensor:
    """(rows, steps, 1) ids of stretches of the text, repeated without end, that start anywhere."""
    starts = torch.randint(len(TEXT), (rows,), generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.tensor([[[LETTERS.index(c)] for c in itertools.islice(itertools.cycle(TEXT), start, start + steps)] for start in starts], dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_learns_a_text_by_heart(kind: str) -> None:
    """From 2.6 nats a letter, knowing nothing, to below 0.1, with the state carried from one stretch to the next."""
    model = language_model(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    lengths, losses = torch.full((8,), 26), []
    for i in range(100):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - i / 100)
        frames = text(8, 52, i)
        state = model.initial_state(8)
        for stretch in frames.split(26, 1):
            logits, state = model(stretch, lengths, state.detach())
            loss = next_token_loss(logits, stretch, lengths)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.clamp_recurrent_()
        losses.append(loss.item())
    assert losses[0] > 1.5
    model.eval()
    with torch.no_grad():
        frames, lengths = text(4, 102, 99), torch.full((4,), 102)
        logits, _ = model(frames, lengths, model.initial_state(4))
    said, following = logits[:, 25:-1].argmax(-1), frames[:, 26:, 0].long()  # after half the text, a reader knows where it is
    assert (said == following).float().mean() > 0.99
    assert next_token_loss(logits[:, 25:], frames[:, 25:], lengths - 25) < 0.1


def test_loss_counts_every_following_token_once_and_padding_never() -> None:
    logits, frames = torch.randn(3, 6, 5, requires_grad=True), torch.randint(5, (3, 6, 1)).float()
    lengths = torch.tensor([6, 3, 1])
    expected = [-torch.log_softmax(logits[row, t], -1)[int(frames[row, t + 1, 0])] for row, n in ((0, 6), (1, 3)) for t in range(n - 1)]
    frames[1, 3:], frames[2, 1:] = 99, float("nan")
    loss = next_token_loss(logits, frames, lengths)
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad[2].any()
    assert not logits.grad[1, 2:].any()


def test_a_model_that_knows_nothing_loses_the_log_of_its_vocabulary() -> None:
    assert next_token_loss(torch.zeros(2, 9, 50), torch.zeros(2, 9, 1), torch.tensor([9, 4])).item() == pytest.approx(math.log(50))


def test_rows_of_one_token_have_nothing_to_predict() -> None:
    with pytest.raises(ValueError, match="no sequence has two tokens"):
        next_token_loss(torch.zeros(2, 4, 5), torch.zeros(2, 4, 1), torch.tensor([1, 0]))


@pytest.mark.parametrize(("wrong", "said"), [(5.0, "5"), (-1.0, "-1"), (1.5, "1.5"), (float("nan"), "nan"), (1e30, "1e[+]30")])
def test_an_id_outside_the_vocabulary_is_refused_by_name(wrong: float, said: str) -> None:
    frames = torch.zeros(4, 2, 1)
    features, lengths = TokenFeatures(5, 3), torch.tensor([4, 2])
    frames[3, 1] = wrong
    features(frames, lengths, torch.zeros(2, 0))  # beyond the row's length it is padding
    frames[1, 1] = wrong
    with pytest.raises(ValueError, match=f"whole number from 0 to 4, got {said}$"):
        features(frames, lengths, torch.zeros(2, 0))


def test_ids_are_checked_before_training_starts() -> None:
    model = language_model("plain")
    model.fit_features([(text(2, 9), torch.tensor([9, 4]))])
    with pytest.raises(ValueError, match=f"from 0 to {len(LETTERS) - 1}, got 99"):
        model.fit_features([(torch.full((1, 3, 1), 99.0), torch.tensor([3]))])


@pytest.mark.parametrize("kind", KINDS)
def test_two_chunks_equal_one_clip(kind: str) -> None:
    model = language_model(kind).eval()
    frames, lengths = text(3, 20), torch.tensor([20, 9, 0])
    whole, end = model(frames, lengths, model.initial_state(3))
    first, middle = model(frames[:, :7], lengths.clamp(max=7), model.initial_state(3))
    rest, last = model(frames[:, 7:], (lengths - 7).clamp(min=0), middle)
    torch.testing.assert_close(torch.cat([first, rest], 1)[0], whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, end, rtol=1e-5, atol=1e-5)
    assert model.state_width == sum(model.backbone.state_widths)  # the embedding remembers nothing


@pytest.mark.parametrize(("shape", "layout"), [((2,), None), ((13, 3), "body-13")])
def test_tokens_are_frames_of_one_number(shape: tuple[int, ...], layout: str | None) -> None:
    with pytest.raises(ValueError, match=r"tokens are frames of shape \(1,\) without a layout"):
        Network(ModelConfig(kind="plain", head="tokens"), shape, 5, layout)
