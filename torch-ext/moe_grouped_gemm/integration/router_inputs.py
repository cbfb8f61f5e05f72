"""What a router's trial runs on: hidden states whose logits tell routers apart, a weight, and biases."""

from __future__ import annotations

from typing import NamedTuple

import torch

ARGUMENT = "<argument>"  # in the place of a path in the module: what its forward is given besides hidden states
MODERATE, SPECIAL = 96, 5  # rows of the hidden states: the first ones, and the last


class Inputs(NamedTuple):
    """Hidden states (T, H), the module's tensors by path, and what its forward may be given besides."""

    x: torch.Tensor
    tensors: dict[str, torch.Tensor]
    argument: torch.Tensor

    def value(self, path: str | None) -> torch.Tensor | None:
        if path is None:
            return None
        return (self.argument if path == ARGUMENT else self.tensors[path]).flatten().float()


def normal(shape: tuple, generator: torch.Generator) -> torch.Tensor:
    """In fp32, whatever a model that is being loaded has made the default."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _bias(shape: tuple, generator: torch.Generator) -> torch.Tensor:
    """So small for half of the experts that scores decide, as large as a score for others, beyond any for the rest.

    Negative: a class may take the choice of experts out of the race by zeros.
    """
    size = normal(shape, generator).abs().flatten()
    kinds = torch.stack([size / 512, size / 512, size / 2, 1 + size])
    quarters = torch.randperm(len(size), generator=generator) * 4 // len(size)
    return -kinds.gather(0, quarters[None])[0].view(shape)


def _hidden_states(weight: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """(T, H) for about the logits that we want, with noise that the weight does not see; and rows for which none of
    that holds: 1e4 times as large, infinite, NaN and zero.

    Logits of moderate size; so large that sigmoids are 1; so small that a sum of sigmoids is about 1e-20, or that all
    of them are zero; so far from one of them that the sum of the others' shares is about 1e-20; and so near to each
    other that scores in 16 bits are equal.
    """
    E, H = weight.shape

    def rows(count, columns=E):
        return normal((count, columns), generator)

    logits = [scale * rows(MODERATE // 4) for scale in (0.5, 2.0, 6.0, 10.0)]
    logits += [25 + 2 * rows(8), -46 + rows(8), -130 + rows(8), -25 + rows(16)]
    logits[-1][torch.arange(16), torch.arange(16) % E] = 25
    logits += [3.5 + 0.2 * rows(64), 0.15 + 0.02 * rows(63)]
    logits = torch.cat(logits)
    # The least hidden states with these logits.
    least = torch.linalg.solve(weight @ weight.T, weight)
    noise = rows(len(logits), H) / H**0.5
    x = logits @ least + noise - (noise @ weight.T) @ least
    special = rows(SPECIAL, H)
    special[0] *= 1e4  # beyond any clamp, and within fp16
    special[1, 0], special[2, 0], special[3, 0], special[4] = float("inf"), -float("inf"), float("nan"), 0
    return torch.cat([x, special]).to(dtype)


def make_inputs(tensors: dict[str, torch.Tensor], weight: str, dtype: torch.dtype) -> Inputs:
    """In the place of a module's tensors, of which one is the weight; the same every time."""
    generator = torch.Generator().manual_seed(0)
    E, H = tensors[weight].shape
    matrix = normal((E, H), generator) * torch.linspace(0.5, 2, E, dtype=torch.float32)[:, None]
    ours = {path: matrix if path == weight else _bias(t.shape, generator) for path, t in tensors.items()}
    ours = {path: tensor.to(tensors[path].dtype) for path, tensor in ours.items()}
    return Inputs(_hidden_states(ours[weight].float(), dtype, generator), ours, _bias((E,), generator))
