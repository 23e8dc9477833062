"""What gunicorn reads by itself, wherever it is started."""

import random

# Workers are forked from a process that has loaded the program: they begin sooner and share its memory.
preload_app = True


def pre_request(worker, request):
    """Close one connection in fifty after its answer, so that it is made anew.

    A connection that is kept stays with the worker that took it, and one worker may take most of them
    while the other has little to do. Whoever has time takes the new one.
    """
    if random.random() < 0.02:
        request.force_close()
