"""Files of published models whose sha256 is known beforehand.

    KNOWN = {"owner/name": {"revision": "<40 hex digits>",
                            "files": {"vae/config.json": {"size": 777, "sha256": "<64 hex digits>"}}}}

A repository listed here is fetched at this revision unless another is asked for, and each listed file
must have this size and this sha256, whatever the hub says.  What is not listed is checked against the
hub's own sha256 of its weights.  The record that `hub.download.find_model` keeps of a download has this form too.

No file of a published model was in reach when this was written, so there is nothing here yet.
"""

KNOWN = {}
