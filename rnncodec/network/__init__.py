"""The networks, and the residual loop that turns an image into bits one iteration at a time.

Nothing here depends on files, entropy coding, data or training.
"""

from rnncodec.network.binarizer import Binarizer, BinarizerName, binarize
from rnncodec.network.cells import CELLS, CellName, GateConv
from rnncodec.network.compressive import FINE, CompressiveAutoencoder, CompressiveConfig
from rnncodec.network.latent import LatentBinarizer, LatentConfig
from rnncodec.network.questions import Questions
from rnncodec.network.recurrent import (
    AnyConfig,
    GainNetwork,
    NetworkConfig,
    ReconstructionName,
    RecurrentCodec,
    State,
    Step,
    config_class,
    network_config,
    pad_to_blocks,
    to_uint8,
    widened,
)
from rnncodec.network.transforms import Window

__all__ = [
    "CELLS",
    "FINE",
    "AnyConfig",
    "Binarizer",
    "BinarizerName",
    "CellName",
    "CompressiveAutoencoder",
    "CompressiveConfig",
    "GainNetwork",
    "GateConv",
    "LatentBinarizer",
    "LatentConfig",
    "NetworkConfig",
    "Questions",
    "ReconstructionName",
    "RecurrentCodec",
    "State",
    "Step",
    "Window",
    "binarize",
    "config_class",
    "network_config",
    "pad_to_blocks",
    "to_uint8",
    "widened",
]
