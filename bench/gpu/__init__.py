# SPDX-License-Identifier: MIT
"""`python -m bench gpu`: everything that needs a GPU, in phases, each cut off at its share of the time.

Before you ask for a machine, run this here (a few minutes; later runs compile only what has changed):

    make gpu-cache

It writes build/gpu-cache.tar: the kernels that the phases launch, for an H100 or H200 with Python 3.12 and Triton
3.6.0. A machine is lent for a quarter of an hour. Make two calls on it, and carry build/gpu-cache.tar along in both.
The first call, with a limit of 500 s, checks the results and measures the speed:

    python3 -m bench gpu --cache build/gpu-cache.tar --sha SHA --out $OUT --seconds 480 --phase smoke --phase tests \
        --phase sweep --phase attention --phase expand --phase profile --phase float32

The second call, with a limit of 240 s, does the rest. Start it while the machine is still held (30 s):

    python3 -m bench gpu --cache build/gpu-cache.tar --sha SHA --out $OUT --seconds 225 --phase flex --phase window \
        --phase decode --phase memory --phase host

The files under $OUT come back even if the command is killed: results.jsonl (a line per cell, written as it comes),
log.txt (everything printed), summary.json, tables.txt, profile.csv and profile.ncu-rep. Without --phase all phases run
in one go. A phase that needs less than its share leaves the time to the later ones. Wrong numbers or a crash in the
smoke phase end the run, after compute-sanitizer has checked that case; --keep-going goes on.
"""
