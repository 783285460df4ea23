"""The resident model: what-if perplexity and text for any set of skipped blocks.

command.py    the run of kind ``live``: device, idle timeout, giving way to queued runs
server.py     loopback connections with a secret; one queue of requests, an event stream for each
store.py      loaded models within a memory budget; least recently used models are evicted first
whatif.py     perplexity of a text without some blocks, reusing what earlier answers computed
writing.py    generated text, token by token
protocol.py   requests, events, and the server's address
client.py     for pages and scripts: find, start, ask, stop; no torch
"""
