"""Does a server speak OpenAI's dialect, and does it do what it says?

Checks are small named functions in `groups`, over plain HTTP: nothing here knows the engine, so any
server can be examined, ours as well as others.
"""
