"""What a command will cost, said before it begins: passes, replies, time on this machine, memory and disk."""
