"""Compiles every kernel as a launch with every size and stride 1 would: the compiler sees those as constants.

Run in a process of its own, without Triton's interpreter; prints what does not compile, and how many kernels there are.
"""

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from cpc_kernels import triton_info_nce, triton_sampled_info_nce

smallest = {}
for module in (triton_info_nce, triton_sampled_info_nce):
    for entry in module.aot_entries("sm_90"):
        area = entry.tile.rows * entry.tile.columns if entry.tile else 0
        known = smallest.get(entry.kernel.__name__)
        if known is None or area < known[0]:
            smallest[entry.kernel.__name__] = area, entry
for name, (_, entry) in smallest.items():
    ones = {argument: 1 for argument, kind in entry.signature.items() if kind in ("i32", "i64")}
    constants = {**entry.constexprs, **ones}
    signature = {a: "constexpr" if a in constants else entry.signature[a] for a in entry.kernel.arg_names}
    try:
        compile(ASTSource(entry.kernel, signature, constants), GPUTarget("cuda", 90, 32), options=dict(entry.options))
    except Exception as problem:
        print(name, repr(problem)[-300:])
print(len(smallest), "kernels")
