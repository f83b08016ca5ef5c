"""How one single-device model trains on many ranks: `ddp` and `fsdp` behind one protocol."""
