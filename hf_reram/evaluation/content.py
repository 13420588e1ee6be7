"""What an evaluation is measured on, as a fingerprint that is the same in another process."""

import hashlib
from typing import Any


def content_of(dataset: Any) -> str:
    """SHA-256 of a data set's content, in hexadecimal: of its rows in their order where it is one of ``datasets``, else
    of the object.

    Raises:
        ValueError: it has no fixed content, or cannot be pickled.
    """
    import pyarrow as pa
    from datasets import Dataset, IterableDataset
    from datasets.fingerprint import Hasher

    if isinstance(dataset, IterableDataset):
        raise ValueError("a streamed data set has no fixed content: say with key=... what is evaluated")
    if not isinstance(dataset, Dataset):
        try:
            return Hasher.hash(dataset)
        except Exception as error:  # whatever its parts raise
            raise ValueError(
                f"the content of {type(dataset).__name__} cannot be told: say with key=... what is evaluated: {error}"
            ) from error
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(1000):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table.combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()
