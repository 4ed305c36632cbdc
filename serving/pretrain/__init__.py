"""How the seedling is made: `python -m nightschool.serving.pretrain --dialogues PATH --out DIR`.

Text (`corpus`), tokens (`tokens`), model (`model`), optimiser (`muon`), the run (`run`), the FP8 checkpoint (`export`)
and what it can do (`measure`). Nothing else in the package imports any of it.
"""
