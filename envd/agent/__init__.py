"""The inside of our own desktops: a guest server that speaks the protocol of OSWorld's (`python -m envd.agent`).

It runs beside an X server and a window manager, and answers screenshots, commands, files and windows on port 5000.
Nothing here imports the rest of the package: the agent is started in a fresh desktop and must be up at once.
"""
