//! The calls that a wrapping store passes on unchanged.

/// Inside `impl BlobStore for Wrapper`, for a field `inner`: everything that tells of the medium.
macro_rules! delegate_description {
    () => {
        fn capabilities(&self) -> mainstay_core::Capabilities {
            self.inner.capabilities()
        }

        fn location(&self) -> String {
            self.inner.location()
        }
    };
}

pub(crate) use delegate_description;
