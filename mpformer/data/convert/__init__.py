"""Data sets of other tools, recognised and written as COCO instance annotations.

`recognise` is all that is loaded here: it needs neither cv2 nor torch. `conversion.convert` does the work.
"""

from mpformer.data.convert.recognise import recognise

__all__ = ["recognise"]
