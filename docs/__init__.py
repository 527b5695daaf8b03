"""The site: its pages, their pictures (`pictures.py`) and where their numbers come from (`measured.py`).

`make docs` builds it into ``build/site``; CONTRIBUTING.md says how a page is written.
"""
