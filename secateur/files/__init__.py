"""Models as files: saved, loaded, and pruned one block at a time without a model in memory."""

from secateur.files.save import load, save
from secateur.files.stream import reconstruct_folder

__all__ = ["load", "reconstruct_folder", "save"]
