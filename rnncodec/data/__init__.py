"""Data for training: `clic` downloads, `cache` decodes, `patches` draws patches, `datamodule` joins the three.

Of tar files, `shards` finds the images, and `windows` draws patches. `manifest` says which images a data set has.
"""

from rnncodec.data.cache import DataError, ImageCache
from rnncodec.data.clic import download_clic
from rnncodec.data.datamodule import PatchDataModule
from rnncodec.data.patches import PatchStream, cut_patches

__all__ = ["DataError", "ImageCache", "PatchDataModule", "PatchStream", "cut_patches", "download_clic"]
