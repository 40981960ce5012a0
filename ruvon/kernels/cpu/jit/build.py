"""One kernel to machine code: numba reads the Python, LLVM does the rest for a CPU we name.

What comes out is an object file with one C function in it that needs nothing but the C library.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import binding
from numba import types

from ruvon.kernels.cpu.arguments import Key
from ruvon.kernels.cpu.formats import FORMATS, TileFormat
from ruvon.kernels.cpu.isa import Isa, target_features
from ruvon.kernels.cpu.jit import (
    attention,
    embed,
    experts,
    largest,
    linear,
    rows,
    sample,
    threads,
    write_kv,
)
from ruvon.kernels.cpu.jit.translate import translate

KERNEL = types.void(*[types.intp] * 5)
FUNCTIONS: dict[str, tuple[Callable[..., None], types.Type]] = {
    "leader": (threads.lead, types.void(*[types.intp] * 2)),
    "worker": (threads.work, types.void(*[types.intp] * 4)),
    "copy": (rows.copy, KERNEL),
    "norm": (rows.norm, KERNEL),
    "route": (experts.route, KERNEL),
    "sort": (experts.sort, KERNEL),
    "dispatch": (experts.dispatch, KERNEL),
    "combine": (experts.combine, KERNEL),
    "argmax": (largest.argmax, KERNEL),
    "sample": (sample.sample, KERNEL),
}
FACTORIES: dict[str, Callable[[TileFormat, Isa], Callable[..., None]]] = {
    "embed": embed.make_embed,
    "linear": linear.make_linear,
    "experts": experts.make_experts,
    "write_kv": write_kv.make_write_kv,
    "attention": attention.make_attention,
}
SPEED = 3  # LLVM's -O3, less its search for loops to vectorize: ours are vectors already


def build(key: Key, isa: Isa, symbol: str) -> bytes:
    """An object file for this machine, with the kernel as a C function of that name."""
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=target_features(isa), opt=SPEED, jit=True
    )
    return bytes(machine.emit_object(optimized(to_llvm(key, isa, symbol), machine)))


def assembly(key: Key, isa: Isa, symbol: str, triple: str, cpu: str, features: str) -> str:
    """What a kernel becomes on another machine: for reading, and for linking it elsewhere."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=SPEED
    )
    module = to_llvm(key, isa, symbol)
    module.triple, module.data_layout = triple, str(machine.target_data)
    return str(machine.emit_assembly(optimized(module, machine)))


def to_llvm(key: Key, isa: Isa, symbol: str) -> binding.ModuleRef:
    """The kernel in LLVM's language, as numba and the generators of this folder write it."""
    name, kind = key
    if kind is None:
        function, signature = FUNCTIONS[name]
    else:
        function, signature = FACTORIES[name](FORMATS[kind], isa), KERNEL
    text, inner = translate(function, signature)
    text += c_function(symbol, inner, len(signature.args))
    module = binding.parse_assembly(text)
    for each in module.functions:
        if not each.is_declaration and each.name != symbol:
            each.linkage = "internal"  # so that what is inlined everywhere goes away
    return module


def c_function(symbol: str, target: str, arguments: int) -> str:
    """A function in front of numba's own, which returns its result and errors through pointers.
    There are none: kernels return nothing and raise nothing."""
    given = ", ".join(f"i64 %{n}" for n in range(arguments))
    return f"""
define void @{symbol}({given}) {{
  %result = alloca ptr
  %error = alloca ptr
  %status = call i32 @{target}(ptr %result, ptr %error, {given})
  ret void
}}
"""


def optimized(module: binding.ModuleRef, machine: binding.TargetMachine) -> binding.ModuleRef:
    options = binding.create_pipeline_tuning_options(SPEED)
    options.loop_vectorization = options.slp_vectorization = False
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return module
