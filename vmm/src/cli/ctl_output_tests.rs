//! What an answer says is shown, whatever fields it comes to have: each field is left out once, and
//! must be missed.

use bulkhead_proto::machine::{DevicesResponse, InfoResponse, MachineConfig};
use bulkhead_proto::protobuf::reflect::{
    FieldDescriptor, MessageDescriptor, ReflectValueBox, ReflectValueRef, RuntimeFieldType,
    RuntimeType,
};
use bulkhead_proto::protobuf::{MessageDyn, MessageFull};

use super::{devices_json, info_json, info_text};

/// Fills messages by their descriptors, each value another one.
struct Filler {
    next: u32,
    /// Which one of several that exclude each other.
    turn: usize,
}

impl Filler {
    fn value(&mut self, kind: &RuntimeType) -> ReflectValueBox {
        self.next += 1;
        match kind {
            RuntimeType::I32 => (self.next as i32).into(),
            RuntimeType::U32 => self.next.into(),
            RuntimeType::U64 => u64::from(self.next).into(),
            RuntimeType::Bool => true.into(),
            RuntimeType::String => format!("text{}", self.next).into(),
            RuntimeType::VecU8 => vec![self.next as u8; 6].into(),
            RuntimeType::Enum(kind) => kind.value_by_index(kind.values().count() - 1).into(),
            RuntimeType::Message(kind) => ReflectValueBox::Message(self.message(kind)),
            other => panic!("{other:?}: a type that answers do not have"),
        }
    }

    fn message(&mut self, kind: &MessageDescriptor) -> Box<dyn MessageDyn> {
        let mut message = kind.new_instance();
        let mut excluded: Vec<u32> = Vec::new();
        for oneof in kind.oneofs() {
            let members: Vec<u32> = oneof.fields().map(|f| f.number() as u32).collect();
            let chosen = members[self.turn % members.len()];
            excluded.extend(members.iter().filter(|number| **number != chosen));
        }
        for field in kind.fields() {
            if excluded.contains(&(field.number() as u32)) {
                continue;
            }
            match field.runtime_field_type() {
                RuntimeFieldType::Singular(of) => {
                    let value = self.value(&of);
                    field.set_singular_field(&mut *message, value);
                }
                RuntimeFieldType::Repeated(of) => {
                    let value = self.value(&of);
                    field.mut_repeated(&mut *message).push(value);
                }
                RuntimeFieldType::Map(..) => panic!("answers have no maps"),
            }
        }
        message
    }
}

fn full<M: MessageFull>(turn: usize) -> M {
    let mut filler = Filler { next: 1, turn };
    *filler
        .message(&M::descriptor())
        .downcast_box::<M>()
        .unwrap()
}

/// The message without one of its fields, at any depth, by the field's name.
fn lacking(message: &dyn MessageDyn) -> Vec<(String, Box<dyn MessageDyn>)> {
    let mut all = Vec::new();
    for field in message.descriptor_dyn().fields() {
        let name = field.name().to_owned();
        if field.is_repeated() {
            if field.get_repeated(message).is_empty() {
                continue;
            }
            let first = field.get_repeated(message).get(0);
            deeper(
                &first,
                &name,
                &mut all,
                message,
                &|field, copy, part| {
                    field.mut_repeated(copy).set(0, part);
                },
                &field,
            );
        } else {
            let Some(value) = field.get_singular(message) else {
                continue;
            };
            deeper(
                &value,
                &name,
                &mut all,
                message,
                &|field, copy, part| {
                    field.set_singular_field(copy, part);
                },
                &field,
            );
        }
        let mut copy = message.clone_box();
        field.clear_field(&mut *copy);
        all.push((name, copy));
    }
    all
}

type Put<'a> = &'a dyn Fn(&FieldDescriptor, &mut dyn MessageDyn, ReflectValueBox);

fn deeper(
    value: &ReflectValueRef<'_>,
    name: &str,
    all: &mut Vec<(String, Box<dyn MessageDyn>)>,
    message: &dyn MessageDyn,
    put: Put<'_>,
    field: &FieldDescriptor,
) {
    let ReflectValueRef::Message(part) = value else {
        return;
    };
    for (inner, part) in lacking(&**part) {
        let mut copy = message.clone_box();
        put(field, &mut *copy, ReflectValueBox::Message(part));
        all.push((format!("{name}.{inner}"), copy));
    }
}

/// Fields of `M` that can be left out and nobody sees it.
fn unseen<M: MessageFull>(turn: usize, show: impl Fn(&M) -> String) -> (Vec<String>, usize) {
    let whole: M = full(turn);
    let shown = show(&whole);
    let all = lacking(&whole);
    let count = all.len();
    let unseen = all.into_iter().filter_map(|(name, without)| {
        let without = without.downcast_box::<M>().unwrap();
        (show(&without) == shown).then_some(name)
    });
    (unseen.collect(), count)
}

#[test]
fn every_field_of_a_machine_is_in_its_json() {
    for turn in 0..3 {
        let (unseen, count) = unseen(turn, |info: &InfoResponse| info_json(info).to_string());
        assert_eq!(unseen, Vec::<String>::new(), "{turn}");
        assert!(count > 120, "{count}");
    }
}

#[test]
fn every_field_of_a_device_is_in_its_json() {
    let json = |devices: &DevicesResponse| devices_json(devices).to_string();
    let (unseen, count) = unseen(0, json);
    assert_eq!(unseen, Vec::<String>::new());
    assert!(count > 20, "{count}");
}

#[test]
fn what_a_machine_is_made_of_is_in_its_text() {
    let text = |info: &InfoResponse| {
        let mut out = Vec::new();
        info_text(&mut out, info).unwrap();
        String::from_utf8(out).unwrap()
    };
    let (unseen, _) = unseen(0, text);
    // Of a device it says what it is, and not all.
    let whole = |name: &&String| !name.trim_start_matches("config.").contains('.');
    let unseen: Vec<&String> = unseen.iter().filter(whole).collect();
    // What there is of memory is said as it is now.
    let fields = ["config.memory_bytes", "config.memory_max_bytes"];
    assert_eq!(unseen, fields);
    assert!(MachineConfig::descriptor().fields().count() > 10);
}
