# SPDX-License-Identifier: MIT
"""`python -m bench gpu`: all that needs a GPU, in phases, each cut off at its part of the time.

Here, before a machine is asked for (a few minutes, later runs compile what has changed only):

    make gpu-cache

which writes build/gpu-cache.tar, the kernels that the phases launch, for an H100 or H200 with Python 3.12 and Triton
3.6.0. Then, on a machine that is lent for a quarter of an hour, two calls, build/gpu-cache.tar carried along in both.
The first, with a limit of 500 s, asks whether all is right and how fast it is:

    python3 -m bench gpu --cache build/gpu-cache.tar --sha SHA --out $OUT --seconds 480 --phase smoke --phase tests \
        --phase sweep --phase attention --phase expand --phase profile --phase float32

and the second, with a limit of 240 s and while the machine is still held (30 s), the rest:

    python3 -m bench gpu --cache build/gpu-cache.tar --sha SHA --out $OUT --seconds 225 --phase flex --phase window \
        --phase memory --phase host

What is under $OUT comes back even where the command is killed: results.jsonl (a line a cell, as they come), log.txt
(all that was printed), summary.json, tables.txt, profile.csv and profile.ncu-rep. Without --phase all phases run in one
go. A phase that needs less than its part leaves the time to those after it. Wrong numbers or a crash in the smoke phase
end the run, after compute-sanitizer has looked at that case; --keep-going goes on.
"""
