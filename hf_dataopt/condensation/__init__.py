"""Dataset condensation (chapter 6): a few synthetic images per class that train like the whole set. Story: `condenser.py`."""
