# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
