"""A picture as a user gets it: a command, a fresh process, a PNG; minisd's command line and what others do for the same.

Read spending (what a process takes), table (the rows), then the scripts of the peers: with_diffusers, with_openvino and, before
it, conversion, with_sdcpp.  A script gets its job as JSON and says on standard error when it is ready to draw.
"""
