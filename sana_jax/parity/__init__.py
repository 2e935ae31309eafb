"""Is this checkpoint the same network here as in PyTorch?  `python -m sana_jax.parity MODEL`

A ladder of comparisons with the installed diffusers and transformers, on the user's own weights:
Gemma-2, each block of the transformer, the transformer, the DC-AE, the solver, the whole picture.
One part is in memory at a time, on one side at a time, in float32.

    rows.py     one line of the table: error, bound, verdict
    weights.py  both sides' weights by their digests
    case.py     what is compared, on which inputs
    peers.py    the PyTorch side: loading its modules, recording what went through them
    forcing.py  our side: running one layer on a recorded input
    gemma.py dit.py dc_ae.py solver.py   the rungs; each also takes its share of the whole picture
    ladder.py report.py __main__.py      order of the rungs, the page, the command
"""
