"""The resident model: what-if perplexity and text for any set of skipped blocks.

command.py    the run of kind ``live``: device, idle time-out, giving way to queued runs
server.py     loopback connections with a secret; questions in one line, each with its stream
store.py      loaded models within a memory budget, least recently used out first
whatif.py     perplexity of a text without some blocks, reusing what earlier answers computed
writing.py    generated text, token by token
protocol.py   questions, events, and where the server is found
client.py     for pages and scripts: find, start, ask, stop; no torch
"""
