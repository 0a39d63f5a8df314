"""The memories of the world model, for the laws of tests/test_laws.py."""

from memories import ModuleMemory, register

from worldmodel.memory import MemoryConfig, MemoryStack, build_memory

CONFIGS = {
    "rotated": MemoryConfig(layers=2, states=4, groups=2, convolution=3, selective_angle=True),
    "unrotated": MemoryConfig(states=3, groups=2, rotated=False),
    "convolution": MemoryConfig(scan=False),
    "gru": MemoryConfig(kind="gru", layers=2),
}


def _built(name: str, width: int) -> MemoryStack:
    return build_memory(MemoryConfig(**{**vars(CONFIGS[name]), "width": width}))


for _name, _config in CONFIGS.items():
    _op = "selective_scan" if _config.kind == "scan" and _config.scan else "linear_scan"
    register(ModuleMemory(f"world model, {_name}", _op, lambda width, name=_name: _built(name, width), widths=(2, 5)))
