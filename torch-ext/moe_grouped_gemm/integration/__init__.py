"""Everything that knows Transformers, PEFT and kernels: which modules we can serve, and how they find us.

A KernelConfig or `use_kernels=True` makes `kernelize` switch modules on (switching.py);
`experts_implementation="moe_grouped_gemm"` makes the experts' own forward call `experts_forward` (modules.py). PEFT's
adapters on expert weights come to both as factors (peft.py).
"""
