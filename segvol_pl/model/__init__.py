"""The architecture and nothing else: it knows no files, no trainer, no losses."""

from segvol_pl.config import SegVolConfig
from segvol_pl.model.segvol import SegVol
from segvol_pl.model.text_encoder import TextBank

__all__ = ["SegVol", "SegVolConfig", "TextBank"]
