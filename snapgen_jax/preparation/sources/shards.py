"""An earlier collection of ours, to be filtered again."""

from __future__ import annotations

from collections.abc import Iterator

from snapgen_jax.data.errors import DataError
from snapgen_jax.data.records import unpack
from snapgen_jax.data.shards import Records, check_files, read_manifest
from snapgen_jax.preparation.collect_config import CollectConfig
from snapgen_jax.preparation.sources.interfaces import RawExample, Unit, columns_of, refuse_missing, texts_of, weighted


class StoredImages:
    """Shards of images, each of which is a unit."""

    def __init__(self, config: CollectConfig):
        manifest = read_manifest(config.path)
        if manifest.kind != "images":
            raise DataError(
                f"{config.path} holds what encoders made of images; give the folder of the images themselves"
            )
        check_files(config.path, manifest)
        wanted = [*config.captions, *config.all_numbers(), *config.texts]
        refuse_missing(wanted, manifest.arrays, "column", config.path)
        self._config, self._shards = config, manifest.shards

    def units(self) -> list[Unit]:
        """A shard each."""
        return [Unit(shard.file, shard.sha256, shard) for shard in self._shards]

    def read(self, unit: Unit) -> Iterator[RawExample]:
        """Each record by the id that it has, with its captions and their weights unless columns are asked for."""
        records = Records(self._config.path, [unit.work])
        for index in range(len(records)):
            try:
                record = unpack(records[index])
                id, image = record["id"], record["image"]
                captions = tuple(zip(record["captions"], map(float, record["caption_weights"]), strict=True))
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{records.name(index)} holds no image of ours: {error}; collect it again") from error
            if self._config.captions:
                texts = {name: texts_of(record.get(name), id) for name in self._config.captions}
                captions = weighted(texts, self._config.captions)
            row = {
                name: getattr(value, "item", lambda value=value: value)()
                for name, value in record.items()
                if name in (*self._config.all_numbers(), *self._config.texts)
            }
            yield RawExample(id, image, captions, columns_of(row, self._config, id))


def build(config: CollectConfig) -> StoredImages:
    """The shards of a config.

    Raises:
        DataError: there is no manifest, it is of encoded examples, a shard is missing, or a column is not there.
    """
    return StoredImages(config)
