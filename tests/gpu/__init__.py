"""What is run on a machine with a GPU, no network and few minutes: ``python -m tests.gpu CALL OUT``.

A call is a list of steps, each a process with a limit of its own. It goes on after failures, ends in time,
and leaves one JSON and one log in OUT; what matters is printed last.
"""
