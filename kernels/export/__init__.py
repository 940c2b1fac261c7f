"""Run folders in the file formats of other programs: integers and scales, dense, with zeros where weights went."""
