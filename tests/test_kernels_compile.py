"""Every Triton kernel, in every configuration that launch_rows() makes of it, compiles for sm_80 and sm_90 without a
GPU, uses no stack (nothing spills) and reads long rows 16 bytes at a time, odd ones too. In a process of its own: where
TRITON_INTERPRET is set, nothing compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("triton", reason="no Triton for this system")

# arguments by type (*z: logits and results, *low: bf16) and constants; launch_rows() appends width and BLOCK
LOGPS = ["*z", "i32", "*i64", "*z", "*z", "*z", 1, None]
LOGPS_GRAD = ["*z", "i32", "*i64", "*z", "*z", "*z", "*z", "*low", "i32", 1, None]
KL = ["*z", "i32", "*z", "i32", "*z", "*z", "*z", "*z"]
KL_GRAD = ["*z", "i32", "*z", "i32", "*z", "*z", "*z", "*z", "*low", "i32"]


def configurations():
    """(kernel's name, arguments, width) of everything the scripts launch: a string is a run-time argument's type."""
    for width in (32, 4097, 151936):  # less than one thread each, an odd one, Qwen's
        yield "logps_kernel", LOGPS, width
        yield "logps_grad_kernel", LOGPS_GRAD, width
    yield "logps_kernel", LOGPS[:4] + [None] + LOGPS[5:], 151936  # no entropy
    yield "logps_grad_kernel", LOGPS_GRAD[:3] + [None] + LOGPS_GRAD[4:6] + [None] + LOGPS_GRAD[7:], 151936
    yield "logps_kernel", LOGPS[:6] + [64, 30.0], 151936  # a teacher's 64 cached tokens, Gemma's soft cap
    yield "logps_grad_kernel", LOGPS_GRAD[:9] + [64, 30.0], 151936
    for kind in ("forward", "reverse", "jsd"):
        for width in (50257, 151936):  # GPT-2's, in rows that aligned_rows() pads
            yield "kl_kernel", KL + [kind, 0.5], width
            yield "kl_grad_kernel", KL_GRAD + [kind, 0.5], width
    for width in (32, 768, 14336):
        yield "swiglu_kernel", ["*low", "*fp32", "*low"], width
        yield "swiglu_grad_kernel", ["*low", "*fp32", "*low", "*low", "*fp32"], width
        yield "gather_sum_kernel", ["*low", "*i64", "*low", 8], width


def stack_bytes(cubin, folder):
    """(bytes of stack, registers) of the compiled kernel, as cuobjdump reports them."""
    from triton.backends import nvidia

    (path := folder / "kernel.cubin").write_bytes(cubin)
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    report = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return int(report.split("STACK:")[1].split()[0]), int(report.split("REG:")[1].split()[0])


def compile_all(folder, low="bf16"):
    """Compiles everything; prints a line each and returns how many use the stack, or read long rows in small pieces."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import kernels

    bad = 0
    for name, arguments, width in configurations():
        kernel = getattr(kernels, name)
        block, warps = kernels.row_launch(width)
        values = [*arguments, width, block]
        types = {"*z": "*fp32", "*low": f"*{low}"}
        constants = {key: value for key, value in zip(kernel.arg_names, values) if not is_type(value)}
        signature = {key: types.get(value, value) if is_type(value) else "constexpr"
                     for key, value in zip(kernel.arg_names, values)}
        aligned = {(i,): [["tt.divisibility", 16]] for i, value in enumerate(values) if is_type(value)}
        for capability in (80, 90):
            compiled = triton.compile(ASTSource(kernel, signature, constants, aligned),
                                      target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
            stack, registers = stack_bytes(compiled.asm["cubin"], folder)
            narrow = width > 4096 and "ld.global.v4" not in compiled.asm["ptx"]
            bad += stack > 0 or narrow
            print(f"sm_{capability} {name} {[v for v in values if not is_type(v)]}, {warps} warps:"
                  f" {registers} registers, {stack} bytes of stack" + ", narrow loads" * narrow)
    return bad


def is_type(value):
    return isinstance(value, str) and (value.startswith("*") or value == "i32")


def test_every_configuration_compiles_without_spills_and_with_wide_loads(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache"),
                   "TRITON_DEFAULT_FP_FUSION": "1", "KERNELS": "auto"}
    result = subprocess.run([sys.executable, __file__, tmp_path], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(1 if compile_all(Path(sys.argv[1])) else 0)
