"""A recurrent progressive image codec: one network and one file for every bit rate.

codec = rnncodec.load()
data = codec.encode(image, psnr=32)
image = codec.decode(data, iterations=4)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    import torch

    from rnncodec.codec import Codec
    from rnncodec.compressive import CompressiveCodec
    from rnncodec.evaluation.evaluate import evaluate

__version__ = "0.1.0"
__all__ = ["Codec", "__version__", "evaluate", "load"]


def load(
    name_or_path: "str | os.PathLike[str] | None" = None,
    device: "str | torch.device" = "cpu",
    *,
    bfloat16: bool = False,
) -> "Codec | CompressiveCodec":
    """Loads trained weights into a codec.

    Args:
        name_or_path: the name of weights that come with the package, or the path of a `.safetensors` file; None for the
            default weights.
        device: where to compute, `cpu` or `cuda`.
        bfloat16: whether to compute in bfloat16 where encoder and decoder need not agree, see `Codec`; compressive
            autoencoders never do.

    Returns:
        A `Codec` for weights of recurrent networks, such as all that come with the package; a `CompressiveCodec` for
        those of compressive autoencoders.

    Raises:
        ValueError: there are no such weights, they are damaged, or the device is not available.
    """
    from rnncodec.codec import Codec
    from rnncodec.compressive import CompressiveCodec
    from rnncodec.network import CompressiveAutoencoder
    from rnncodec.weights import DEFAULT_NAME, load_weights

    weights = load_weights(DEFAULT_NAME if name_or_path is None else name_or_path)
    if isinstance(weights.network, CompressiveAutoencoder):
        return CompressiveCodec(weights, device)
    return Codec(weights, device, bfloat16=bfloat16)


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and `rnncodec info` and `truncate` do without it.
    if name == "Codec":
        from rnncodec.codec import Codec

        return Codec
    if name == "evaluate":
        # By name, because every module imports this package, but most must not depend on the evaluation.
        return import_module("rnncodec.evaluation.evaluate").evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
