use std::ops::Range;

use cogvlm_core::DType;

use super::Make;
use super::approx::assert_same_bits;
use super::data::{Random, garbage};
use super::harness::{buffer, devices, refuses, refuses_shape, typed_buffer};
use crate::Backend;
use crate::oracle::round_to;

const WIDTH: usize = 37;
const ROWS: usize = 9;

/// A range whose end lies before its start.
const REVERSED: Range<usize> = Range { start: 5, end: 2 };

/// What is written can be read, rounded once to the nearest value of the buffer's type.
pub fn write_read<B: Backend>(make: Make<'_, B>) {
    let backend = make();
    for dtype in [backend.activation_dtype(), DType::F32] {
        let before = garbage(dtype, ROWS * WIDTH);
        let mut held = typed_buffer(&backend, dtype, ROWS, WIDTH, &before);
        let mut values = Random::new(1).values(DType::F32, 3 * WIDTH, 1.0);
        // Ties of bf16, both signs, zeros, and the ends of its range.
        let tie = 1.0 / 256.0;
        let special = [1.0 + tie, 1.0 + 3.0 * tie, -1.0 - tie, 0.0, -0.0, 3.0e38, -3.0e38, 1.2e-38, 65_504.0];
        values[..special.len()].copy_from_slice(&special);
        backend.write(&values, &mut held, 4).expect("three rows fit behind the fourth");
        let rounded: Vec<f32> = values.iter().map(|&value| round_to(dtype, f64::from(value))).collect();
        let expected = [&before[..4 * WIDTH], &rounded, &before[7 * WIDTH..]].concat();
        assert_same_bits("write, all rows", &backend.read(&held, 0..ROWS).expect("rows fit"), &expected);
        let some = backend.read(&held, 5..8).expect("rows fit");
        assert_same_bits("read, some rows", &some, &expected[5 * WIDTH..8 * WIDTH]);
        assert!(backend.read(&held, ROWS..ROWS).expect("no rows can be read").is_empty());
        backend.write(&[], &mut held, ROWS).expect("no rows can be written");

        refuses_shape("write: rows beyond the last", backend.write(&values, &mut held, ROWS - 2));
        refuses_shape("write: rows far beyond the last", backend.write(&values, &mut held, usize::MAX));
        refuses_shape("write: part of a row", backend.write(&values[1..], &mut held, 0));
        refuses_shape("read: rows beyond the last", backend.read(&held, ROWS - 1..ROWS + 1));
        refuses_shape("read: rows far beyond the last", backend.read(&held, 0..usize::MAX));
        refuses_shape("read: a reversed range", backend.read(&held, REVERSED));
        assert_same_bits("after refusals", &backend.read(&held, 0..ROWS).expect("rows fit"), &expected);
    }
}

/// Rows are copied as they are, and only they.
pub fn copy_rows<B: Backend>(make: Make<'_, B>) {
    let backend = make();
    let dtype = backend.activation_dtype();
    let values = Random::new(2).values(dtype, ROWS * WIDTH, 1.0);
    let source = buffer(&backend, ROWS, WIDTH, &values);
    for (rows, first_row) in [(0..ROWS, 3), (2..5, 0), (8..9, 11), (4..4, 12)] {
        let before = garbage(dtype, (ROWS + 3) * WIDTH);
        let mut destination = buffer(&backend, ROWS + 3, WIDTH, &before);
        backend.copy_rows(&source, rows.clone(), &mut destination, first_row).expect("rows fit");
        let mut expected = before;
        expected[first_row * WIDTH..][..rows.len() * WIDTH]
            .copy_from_slice(&values[rows.start * WIDTH..rows.end * WIDTH]);
        let found = backend.read(&destination, 0..ROWS + 3).expect("rows fit");
        assert_same_bits(&format!("copy of rows {rows:?} to {first_row}"), &found, &expected);
    }
    let mut destination = buffer(&backend, ROWS, WIDTH, &[]);
    let mut narrow = buffer(&backend, ROWS, WIDTH - 1, &[]);
    refuses_shape("copy_rows: another width", backend.copy_rows(&source, 0..1, &mut narrow, 0));
    refuses_shape("copy_rows: rows that are not there", backend.copy_rows(&source, 5..ROWS + 1, &mut destination, 0));
    refuses_shape("copy_rows: a reversed range", backend.copy_rows(&source, REVERSED, &mut destination, 0));
    refuses_shape("copy_rows: beyond the end", backend.copy_rows(&source, 0..3, &mut destination, ROWS - 2));
    refuses_shape("copy_rows: far beyond the end", backend.copy_rows(&source, 0..3, &mut destination, usize::MAX));
    if dtype != DType::F32 {
        let mut wide = typed_buffer(&backend, DType::F32, ROWS, WIDTH, &[]);
        refuses("copy_rows: another type", backend.copy_rows(&source, 0..1, &mut wide, 0));
    }
}

/// Room for two parcels of all rows of a test, and something.
const OUTBOX_BYTES: usize = 2 * (ROWS * WIDTH * 4).next_multiple_of(256) + 256;

/// Parcels are under way side by side, are received in any order, and give their room to those after them, for which a
/// sender waits.
fn several_parcels<B: Backend>(sender: &B, receiver: &B, outbox: &B::Outbox, values: &[f32]) {
    let dtype = sender.activation_dtype();
    let rows_of = |turn: usize| -> Vec<f32> { values.iter().map(|value| value * (turn + 1) as f32).collect() };
    let rounded = |values: Vec<f32>| -> Vec<f32> { values.iter().map(|v| round_to(dtype, f64::from(*v))).collect() };
    let send = |turn: usize| {
        let source = buffer(sender, ROWS, WIDTH, &rows_of(turn));
        sender.send(outbox, &source, 0..ROWS).expect("rows fit")
    };
    let receive = |turn: usize, parcel: B::Parcel| {
        let mut destination = buffer(receiver, ROWS, WIDTH, &[]);
        receiver.receive(parcel, &mut destination, 0).expect("rows fit");
        let found = receiver.read(&destination, 0..ROWS).expect("rows fit");
        assert_same_bits(&format!("parcel {turn}"), &found, &rounded(rows_of(turn)));
    };
    std::thread::scope(|scope| {
        let (parcels, inbox) = std::sync::mpsc::sync_channel(8);
        scope.spawn(move || (0..12).for_each(|turn| parcels.send(send(turn)).expect("the receiver takes all of them")));
        let mut held = Vec::new();
        for turn in 0..12 {
            held.push((turn, inbox.recv().expect("the sender sends all of them")));
            if held.len() == 2 {
                // The second before the first.
                held.drain(..).rev().for_each(|(turn, parcel)| receive(turn, parcel));
            }
        }
    });
}

/// Rows reach another device bit for bit, as they were when they were sent.
pub fn send_receive<B: Backend>(make: Make<'_, B>) {
    let devices = devices(make);
    let dtype = devices[0].activation_dtype();
    let values = Random::new(3).values(dtype, ROWS * WIDTH, 1.0);
    for (from, to) in [(0, 1), (1, 0), (0, 0)] {
        let (sender, receiver) = (&devices[from], &devices[to]);
        for (rows, first_row) in [(0..ROWS, 2), (3..4, 0), (5..5, 1)] {
            let before = garbage(dtype, (ROWS + 3) * WIDTH);
            let mut source = buffer(sender, ROWS, WIDTH, &values);
            let mut destination = buffer(receiver, ROWS + 3, WIDTH, &before);
            let outbox = sender.outbox(OUTBOX_BYTES).expect("the arena is empty");
            let parcel = sender.send(&outbox, &source, rows.clone()).expect("rows fit");
            sender.write(&before[..ROWS * WIDTH], &mut source, 0).expect("rows fit");
            drop(source);
            receiver.receive(parcel, &mut destination, first_row).expect("rows fit");
            let mut expected = before;
            expected[first_row * WIDTH..][..rows.len() * WIDTH]
                .copy_from_slice(&values[rows.start * WIDTH..rows.end * WIDTH]);
            let found = receiver.read(&destination, 0..ROWS + 3).expect("rows fit");
            assert_same_bits(&format!("rows {rows:?} of device {from} on device {to}"), &found, &expected);
        }
    }
    let [sender, receiver] = &devices;
    let source = buffer(sender, ROWS, WIDTH, &values);
    let outbox = sender.outbox(OUTBOX_BYTES).expect("the arena is empty");
    assert!(sender.memory().in_use >= OUTBOX_BYTES as u64, "an outbox is part of the arena");
    refuses_shape("send: rows that are not there", sender.send(&outbox, &source, 0..ROWS + 1));
    refuses_shape("send: a reversed range", sender.send(&outbox, &source, REVERSED));
    let parcel = || sender.send(&outbox, &source, 0..3).expect("rows fit");
    let mut destination = buffer(receiver, ROWS, WIDTH, &[]);
    let mut narrow = buffer(receiver, ROWS, WIDTH - 1, &[]);
    refuses_shape("receive: another width", receiver.receive(parcel(), &mut narrow, 0));
    refuses_shape("receive: beyond the end", receiver.receive(parcel(), &mut destination, ROWS - 2));
    refuses_shape("receive: far beyond the end", receiver.receive(parcel(), &mut destination, usize::MAX));
    several_parcels(sender, receiver, &outbox, &values);
    drop((destination, narrow, source, outbox));
    assert_eq!([sender.memory().in_use, receiver.memory().in_use], [0, 0], "parcels leave nothing behind");
}

/// Moments come in their order, once what was called before them is done.
pub fn moments<B: Backend>(make: Make<'_, B>) {
    let backend = make();
    let values = Random::new(4).values(backend.activation_dtype(), ROWS * WIDTH, 1.0);
    let source = buffer(&backend, ROWS, WIDTH, &values);
    let mut destination = buffer(&backend, ROWS, WIDTH, &values);
    let before = backend.moment().expect("moments can be had at any time");
    backend.copy_rows(&source, 0..ROWS, &mut destination, 0).expect("rows fit");
    let after = backend.moment().expect("moments can be had at any time");
    // Rows that have come to the host were computed.
    drop(backend.read(&destination, 0..ROWS));
    for moment in [&before, &after] {
        assert!(backend.has_come(moment).expect("anybody may ask"), "a moment has not come though all is done");
    }
    let elapsed = backend.elapsed(&before, &after).expect("both have come");
    assert!(elapsed.as_secs() < 60, "a copy of {ROWS} rows took {elapsed:?}");
}
