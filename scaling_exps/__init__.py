"""scalerun: large-batch training that can be trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling_exps.rules.scale import scale as scale

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "scale":  # on first use: `import scaling_exps` stays free of everything
        from scaling_exps.rules.scale import scale

        return scale
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
