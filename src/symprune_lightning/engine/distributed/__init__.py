"""Everything that uses ``torch.distributed``: collectives, DTensor helpers, sharded placement."""
