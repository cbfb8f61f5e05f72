#!/usr/bin/env python3
"""Generates text with a DeepSeek-V3 whose experts run on this kernel, by one of three ways.

Usage: generate.py MODEL [use_kernels | experts_implementation | kernel_config]
"""

import sys

from kernels import get_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer, KernelConfig

model_id, way = (sys.argv[1:] + ["use_kernels"])[:2]

if way == "kernel_config":
    # Transformers fetches the kernel by itself. Accelerators and inference only.
    source = ("org/moe-grouped-gemm:MoEExperts", {"version": 1, "trust_remote_code": True})
    options = {"use_kernels": True, "kernel_config": KernelConfig({"DeepseekV3Experts": source})}
else:
    # After register(), either option works for most MoE models, on CPU and GPU, for inference and training.
    get_kernel("org/moe-grouped-gemm", version=1, trust_remote_code=True).register()
    options = {"use_kernels": {"use_kernels": True}, "experts_implementation": {way: "moe_grouped_gemm"}}[way]

model = AutoModelForCausalLM.from_pretrained(model_id, dtype="auto", device_map="auto", **options)
tokenizer = AutoTokenizer.from_pretrained(model_id)
inputs = tokenizer("Mixture-of-Experts layers are", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
