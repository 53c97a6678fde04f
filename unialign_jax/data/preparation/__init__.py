"""From sources to a data folder: by processes of this machine or by Apache Beam, and never twice the same work.

1. Each part of a source (`sources.Part`) becomes a piece: a file of records and what is known of them (`pieces`).
2. When all pieces are there, records of the same key are dropped, and the rest is packed into shards (`packing`).
3. The shards, their metadata and the report get the folder's name (`packing.publish`).

Pieces and shards lie in a hidden folder beside the output until then, each of them written whole or not at all, so that
after a kill the same command resumes with those that are missing.
"""
