"""Circuits: assembly, gains, faithfulness, dial, methods, where artefacts lie."""
