"""`minisd serve`: the library and the pipeline over HTTP, in the dialects of OctoAI, A1111 and OpenAI.

A request comes in through guard.py, becomes a Drawing in the file of its dialect, waits in the queue of jobs.py, and is drawn by
the worker of a device with the models that shelf.py keeps in memory.  service.py is what the dialects share.
"""
