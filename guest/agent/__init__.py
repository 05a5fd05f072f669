"""The guest's agent: PID 1 of the machine. Serves Kata's AgentService and Health over ttrpc, and runs
containers with crun.

Everything here is imported before the agent listens, under an emulated CPU: what an import costs is part of
every container's start, so rare ones happen inside the functions that need them.
"""

VERSION = "0.1.0"
