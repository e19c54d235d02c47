"""scalerun: large-batch training that can be trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling_exps.noise.probe import NoiseProbe as NoiseProbe
    from scaling_exps.rules.scale import scale as scale

__version__ = "0.1.0"
_LAZY = {"scale": "scaling_exps.rules.scale", "NoiseProbe": "scaling_exps.noise.probe"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:  # on first use: `import scaling_exps` stays free of everything
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
