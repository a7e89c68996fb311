"""The languages that clients speak, each in a file of its own: from the fields of a request to a Drawing, and to their answer."""

from . import a1111, a1111_lists, assets, octoai, openai

DIALECTS = [octoai.router, assets.router, a1111.router, a1111_lists.router, a1111_lists.controlnet, openai.router]
# What a dialect calls the fields whose names are others there, by where its paths begin.
NAMES = {"/generate/": octoai.NAMES, "/sdapi/": a1111.NAMES, "/v1/images/": openai.NAMES}
