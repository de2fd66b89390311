"""Studies: methods x options x seeds on one data set, compared with statistics.

`spec` reads study.yaml, `search` makes variants of it, `execution` trains them, `comparison` computes what differs, `page` shows
it; `conduct` is all of that.
"""
