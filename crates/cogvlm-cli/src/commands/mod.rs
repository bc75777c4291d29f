//! One file per command.

pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod generate;
pub(crate) mod inspect;
pub(crate) mod plan;
pub(crate) mod preprocess;
pub(crate) mod synth;
pub(crate) mod tokenize;
