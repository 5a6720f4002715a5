"""One loaded model: architecture, sites, hooks, tokens, devices, memory, unit interventions."""
