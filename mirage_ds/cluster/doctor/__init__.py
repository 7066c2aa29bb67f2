"""`mirage-ds doctor`: whether these hosts can run the job, asked in seconds before it is started.

    command → examine → transport → probe (on each host)          what is there
                      → bandwidth → transport → rank (each slot)  how fast the hosts talk
            → checks (facts → findings) → report

`probe.py` and `rank.py` are sent to the hosts as text and need nothing there but the interpreter, so that a host
without this package, or with another version of it, can say so.
"""
