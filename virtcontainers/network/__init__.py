"""The pod's network: what is found in its namespace, and how the machine gets it, after Kata's `network.go`.

Only a short-lived child works in the namespace and knows netlink (`child`, `netns`); this process decides
(`endpoints`), plugs and tells the agent (`network`).
"""
