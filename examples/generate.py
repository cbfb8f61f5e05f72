#!/usr/bin/env python3
"""Generates text with an MoE model whose experts run on this kernel, switched on in one of three ways.

use_kernels             most MoE models, on CPU and GPU, for inference and training
experts_implementation  the same, and no layer but the experts changes
kernel_config           DeepSeek-V3, on a GPU, for inference; Transformers fetches the kernel by itself
"""

import argparse
import os
from pathlib import Path

import one_line_errors
from kernels import get_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer, KernelConfig

REPO_ID = "org/moe-grouped-gemm"
WAYS = ("use_kernels", "experts_implementation", "kernel_config")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a checkpoint folder or Hub id")
parser.add_argument("way", nargs="?", choices=WAYS, default="use_kernels", help="default: %(default)s")
args = parser.parse_args()

# Unless told otherwise, the build in this checkout (`make build`) stands for the one on the Hub.
os.environ.setdefault("LOCAL_KERNELS", f"{REPO_ID}={Path(__file__).resolve().parent.parent}")

if args.way == "kernel_config":
    one_line_errors.need_gpu()
    source = (f"{REPO_ID}:MoEExperts", {"version": 1, "trust_remote_code": True})
    options = {"use_kernels": True, "kernel_config": KernelConfig({"DeepseekV3Experts": source})}
else:
    get_kernel(REPO_ID, version=1, trust_remote_code=True).register()
    options = {"use_kernels": {"use_kernels": True}, "experts_implementation": {args.way: "moe_grouped_gemm"}}[args.way]

model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map="auto", **options)
tokenizer = AutoTokenizer.from_pretrained(args.model)
inputs = tokenizer("Mixture-of-Experts layers are", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
