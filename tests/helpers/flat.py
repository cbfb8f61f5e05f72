"""What the ops of experts/ops.py run on a GPU or, in reference/, on a CPU; tensors by kind, not by weight."""

# Where each kind stands among the inputs that have gradients: two, and five of each weight.
KINDS = {"hidden_states": 0, "top_k_weights": 1, "gate_up_proj": 2, "down_proj": 7}
KINDS |= {"gate_up_proj_bias": 3, "down_proj_bias": 8, "A1": 5, "B1": 6, "A2": 10, "B2": 11}


class ByKind:
    """kinds: how many there are; 6 without adapters."""

    def __init__(self, ops, kinds=6, scales=(None, None), where="gpu"):
        self.ops, self.others, self.scales = ops, kinds - 1, scales
        self.run_training, self.run_backward = (
            getattr(ops, f"_{name}_on_{where}") for name in ("training", "backward")
        )

    def training(self, x, index, *args):
        return self.run_training(x, index, *self.flat(args[: self.others]), *args[self.others :])

    def training_fake(self, x, index, *args):
        return self.ops._training_fake(x, index, *self.flat(args[: self.others]), *args[self.others :])

    def backward(self, *args):
        return self.by_kind(self.run_backward(*self.of_backward(*args)))

    def backward_fake(self, *args):
        return self.by_kind(self.ops._backward_fake(*self.of_backward(*args)))

    def flat(self, tensors):
        top_k_weights, gate_up, down, *others = tensors
        up_bias, down_bias, A1, B1, A2, B2 = (*others, *[None] * (6 - len(others)))
        return top_k_weights, gate_up, up_bias, self.scales[0], A1, B1, down, down_bias, self.scales[1], A2, B2

    def of_backward(self, dout, x, *args):
        saved, (needs_grad, *gate) = args[self.others : self.others + 6], args[self.others + 6 :]
        needed = dict(zip(KINDS.values(), needs_grad))
        return dout, x, *self.flat(args[: self.others]), *saved, [needed.get(i, False) for i in range(12)], *gate

    def by_kind(self, grads):
        return tuple(grads[place] for place in list(KINDS.values())[: self.others + 1])
