"""The place memory; its GPU kernels have not run on a GPU."""

from wmkernels.registry import OpSpec, register

SPEC = register(OpSpec(name="place_memory", functions=("place_memory",)))
