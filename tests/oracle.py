"""Random layers, and how far from the fp64 result a right answer may be."""

import torch

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def layer(tokens, experts, top_k, hidden_dim, inter, dtype=torch.float32, device="cpu", ids="distinct", seed=0):
    """(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj) as `moe_experts` takes them.

    ids: "distinct": each token picks top_k different experts; "any": an expert may come twice in a row; "one": all
    slots go to the last expert; "zipf": expert e with odds 1 / (e + 1); "sentinels": as "any", but about a third of
    the ids lie outside [0, experts).
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    odds = torch.ones(experts)
    if ids == "zipf":
        odds = 1 / torch.arange(1, experts + 1)
    if ids == "one":
        index = torch.full((tokens, top_k), experts - 1)
    elif ids == "sentinels":
        index = torch.randint(-experts // 4 - 1, experts + experts // 4 + 1, (tokens, top_k), generator=generator)
    elif tokens * top_k == 0:
        index = torch.zeros(tokens, top_k, dtype=torch.int64)
    else:
        index = torch.multinomial(odds.expand(tokens, -1), top_k, replacement=ids == "any", generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator)
    floats = (
        randn(tokens, hidden_dim),
        randn(experts, 2 * inter, hidden_dim) / hidden_dim**0.5,
        randn(experts, hidden_dim, inter) / inter**0.5,
    )
    x, gate_up_proj, down_proj = (t.to(dtype).to(device) for t in floats)
    return x, index.to(device), weights.to(device), gate_up_proj, down_proj


def in_fp64(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def assert_as_good_as_torch(out, torch_out, exact):
    """The error against fp64 is at most twice what torch makes in the same dtype, plus one rounding of the result.

    The last term is fp32's own: a sum of some hundred products in another order than cuBLAS chose.
    """
    assert out.dtype == torch_out.dtype and out.shape == torch_out.shape
    if not out.numel():
        return
    scale = exact.abs().max()
    rounding = (torch.finfo(out.dtype).eps + 16 * torch.finfo(torch.float32).eps) * scale
    error, torch_error = (out.double() - exact).abs().max(), (torch_out.double() - exact).abs().max()
    assert error <= 2 * torch_error + rounding, f"error {error:.3g}, torch's {torch_error:.3g}, scale {scale:.3g}"
